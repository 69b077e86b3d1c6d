"""Ray: shards by Ray Data, training by Ray Train, trials by Ray Tune, plain tasks, and jobs by its Jobs API."""
