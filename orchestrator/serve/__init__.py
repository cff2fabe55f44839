"""The inference engine, the deltas it holds, and the HTTP app in front of it."""
