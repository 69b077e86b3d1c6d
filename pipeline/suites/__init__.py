"""What is measured of a student beside its task's own protocol: where it leaves its teacher in text that is written,
and tasks of lm-eval. Each suite says of which split it is: validation may choose, test is shown."""
