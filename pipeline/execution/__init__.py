"""Ray: shards by Ray Data, training by Ray Train, trials by Ray Tune, and plain tasks."""
