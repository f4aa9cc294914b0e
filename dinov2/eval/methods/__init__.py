"""The methods of a comparison: what each is made of, its settings, and how it is opened."""
