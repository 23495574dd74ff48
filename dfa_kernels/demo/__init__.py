"""The demos train small networks on data that is there already, by DFA and by what it replaces.

`perceptron` needs the `demo` extra, `transformer` of it only rich and matplotlib.
"""
