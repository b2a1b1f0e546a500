"""Processes for foreign code: started when first needed, killed at a deadline, replaced."""
