"""Model families: which modules of a transformers model are quantized (`gpt2`, `llama`, `bart`), and how models
are built, checked and prepared (`models`, `attention`)."""
