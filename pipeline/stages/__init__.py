"""The stages, one a file. Each is `run(step) -> record`: a function of its recipe and the records before it."""
