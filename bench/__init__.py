"""What the gateway costs, beside what others cost: `python -m bench --help`."""
