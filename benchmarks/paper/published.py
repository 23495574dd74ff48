"""Figure 4 as the paper's authors published it: CIFAR-10, 3x800 tanh, 50 epochs, one seed.

From the list `STD` of bottleneck_from_log.py in github.com/lightonai/principled-dfa-training,
commit a8f0e4d. Tables 2 and 4 are not in that code, and no number of theirs is given here.
"""

BOTTLENECKS = (1, 3, 5, 8, 11, 18, 28, 46, 73, 118, 191, 308, 496, 800)
# In percent, by bottleneck.
TEST_ACCURACY = (
    *(40.5, 41.1, 41.5, 41.9, 42.8, 43.4, 44.6),
    *(45.6, 46.8, 47.9, 47.6, 46.8, 46.4, 47.1),
)
# The cosine's mean over a batch after the second layer, the one with the bottleneck.
ALIGNMENT = (
    *(0.0689, 0.1677, 0.2342, 0.3154, 0.3744, 0.4655, 0.5406),
    *(0.6217, 0.6917, 0.7597, 0.826, 0.8705, 0.8953, 0.8924),
)
