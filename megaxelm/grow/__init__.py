"""New languages as new experts that branch from old ones, comparisons with continued training (LAPT), and languages that are dropped."""
