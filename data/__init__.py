"""Programs that make or fetch data, beside what they write."""
