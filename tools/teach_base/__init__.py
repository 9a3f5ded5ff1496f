"""Makes the base weights that ``vipllava/sample_world/base`` ships: a maintainer's tool."""
