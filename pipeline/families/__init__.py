"""Model families: which modules of a transformers model are quantized (`gpt2`, `llama`), and how models are built,
checked and prepared (`models`, `attention`)."""
