"""Pure counting in texts and numbers, the wordings that are recognised, one Figure and the figures' names. No model,
no file, no clock."""
