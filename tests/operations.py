"""What is counted in place of time: operations that launch work."""

from jobs.bench.training.measures import Launches as Launches
