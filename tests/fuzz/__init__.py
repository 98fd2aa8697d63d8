"""Fuzzing of everything that reads untrusted bytes."""
