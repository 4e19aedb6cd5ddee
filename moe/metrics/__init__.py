"""Every metric: what it means, and its formula over the sums that routing leaves behind."""
