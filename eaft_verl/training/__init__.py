"""Everything that runs on verl and Ray. No other folder imports them."""
