"""``avmp bench predict``: how well answer lengths are forecast, on any trace, test then train."""
