"""`python -m bitnet_rs`: the command line, for where the `bitnet-rs` script is not on the path."""

from bitnet_rs.cli import main

main()
