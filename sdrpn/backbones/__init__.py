"""Model families behind one protocol: everything that differs between them."""
