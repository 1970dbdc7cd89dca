"""Models that AU-LLaVA must be compared with."""
