"""An OpenAI-compatible server over a mixture of experts: `megaxelm serve RUN`. Needs the extra `serve`."""
