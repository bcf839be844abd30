"""What reads and encodes tables, and programs that make or fetch data, beside what they write."""
