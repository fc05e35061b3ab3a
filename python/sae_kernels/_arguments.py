"""What all functions ask of their arrays, whoever they belong to."""


def check_matrix(name, shape, what):
    """(rows, columns) of a shape, or ValueError."""
    if len(shape) != 2:
        raise ValueError(f"{name} has shape {tuple(shape)}, but it must be a matrix {what}")
    return shape


def check_shape(name, shape, expected, what):
    if tuple(shape) != tuple(expected):
        raise ValueError(f"{name} has shape {tuple(shape)}, but it must be {what}: {tuple(expected)}")


def check_device(name, found, other, expected):
    if found != expected:
        raise ValueError(f"{name} is on {found} and {other} on {expected}: move one of them, for they must be on the same device")


def check_type(name, found, other, expected):
    if found != expected:
        raise TypeError(f"{name} is {found} and {other} is {expected}: convert one of them, for they must be of the same type")
