"""The parts of softmax attention; scaled_dot_product_attention.py says what each is for."""
