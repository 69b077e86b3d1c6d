"""The measured claims, each by one command: `quantizers` compares recipes, `paper` stands beside the paper's tables,
`sizes` counts bytes, `inference` times engines. README.md beside this file has the results."""
