"""The measured claims of the README, each by one command: `quantizers` compares recipes, `paper` stands beside the
paper's tables, `sizes` counts bytes, `inference` times engines."""
