"""The scheduler measured: simulated model servers, a public trace, and what others publish beside it."""
