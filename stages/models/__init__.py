"""What a model family needs: where it lies, its vocabulary, its prompt, its layers and output head."""
