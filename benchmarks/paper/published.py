"""Figure 4 as the authors published it: CIFAR-10, 3x800 tanh, 50 epochs, one seed.

From the list `STD` in bottleneck_from_log.py of github.com/lightonai/principled-dfa-training,
commit a8f0e4d. That code has no numbers of tables 2 and 4, so there are none here.
"""

BOTTLENECKS = (1, 3, 5, 8, 11, 18, 28, 46, 73, 118, 191, 308, 496, 800)
# In percent, by bottleneck.
TEST_ACCURACY = (
    *(40.5, 41.1, 41.5, 41.9, 42.8, 43.4, 44.6),
    *(45.6, 46.8, 47.9, 47.6, 46.8, 46.4, 47.1),
)
# Mean cosine over a batch after the second layer, which has the bottleneck.
ALIGNMENT = (
    *(0.0689, 0.1677, 0.2342, 0.3154, 0.3744, 0.4655, 0.5406),
    *(0.6217, 0.6917, 0.7597, 0.826, 0.8705, 0.8953, 0.8924),
)
