"""In the place of soundfile: SGLang imports it for audio, which nothing here sends."""
