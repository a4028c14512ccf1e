"""INT8 learned from images: where a trunk is quantised, with which ranges, and which layers better stay float."""
