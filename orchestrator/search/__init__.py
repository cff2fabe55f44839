"""Search: the space of trials and how it is sampled, the study and its report. No ray, no torch."""
