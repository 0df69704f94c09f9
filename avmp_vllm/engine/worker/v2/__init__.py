"""Model Runner V2: block tables are resolved by one launch a step, or left as handles."""
