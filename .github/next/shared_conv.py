"""One 1x1 convolution an edge for its four convolutions (two: of a separable's first half, and of its
second half and the dilated ones): parameter tying. state_dict keeps every key, so nes.one_shot works
as it is; parameters() and the optimizer see each shared one once. In train_shared, after `build`:
    share_pointwise(net)
"""

def share_pointwise(net):
    """Let the four convolutions of each edge of a supernet have their 1x1 convolutions in common.

    A depthwise filter and batch norm stay each operation's own: one that comes late on the dial
    finds its channels mixed already.
    """
    for op in (edge.ops for cell in net.cells for edge in cell.edges):
        (first, _, second), (other_first, _, other_second) = op["sep_conv_3x3"], op["sep_conv_5x5"]
        other_first[1] = first[1]
        for half in (other_second, op["dil_conv_3x3"], op["dil_conv_5x5"]):
            half[1] = second[1]
