"""Training at full speed, measured: `bench train` takes single steps, `bench real` whole students under a budget."""
