"""What each objective buys: mixes trained with equal compute and equal seeds, and judged on the same suites."""
