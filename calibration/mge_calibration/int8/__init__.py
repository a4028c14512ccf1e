"""INT8 learned from images: where a backbone is quantized, with which ranges, and which layers better stay float."""
