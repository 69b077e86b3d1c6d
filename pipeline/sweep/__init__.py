"""Many runs of the flow that share what they can."""
