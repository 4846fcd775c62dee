"""The networks: pure functions of parameters and images that know no data and no mesh axis."""
