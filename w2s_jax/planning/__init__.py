"""Plans a config's steps on a mesh without running them."""
