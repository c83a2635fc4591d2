"""Speed beside a peer: the same weights, inputs and sizes in two programs that take turns, each in
a process of its own."""
