"""Helpers of the tests in the directory above."""
