"""What an adapter has learnt: interference between tasks, and which factors inputs choose."""
