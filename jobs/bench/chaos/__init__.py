"""`bitmill bench chaos`: a cluster and an S3 on this machine that fail on purpose, while a model is compressed."""
