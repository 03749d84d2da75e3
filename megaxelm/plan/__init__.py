"""What a recipe will need, before it runs: memory by part, what fits, steps, time and cost. `megaxelm plan`."""
