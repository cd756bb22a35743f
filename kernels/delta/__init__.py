"""The gated delta rule and the short convolution in front of it: plain forms, and the kernel of a library."""
