"""Training: ZeRO, the engine, trials, the loop. Knows nothing of Ray."""
