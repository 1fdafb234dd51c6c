"""The pure part: values and ``now`` go in, values come out. No Twisted, no sockets, no files, no clock."""
