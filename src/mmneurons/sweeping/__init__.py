"""A whole data set through `find`: shard by shard, on this machine or by Ray, into a run that the atlas reads."""
