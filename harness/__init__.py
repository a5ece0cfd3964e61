"""Everything around the method: commands import it, it imports the method; the method imports only `errors`.

command line and machine   cli machine distributed interrupt errors
speed                      compiled graphs channel_padding cost progress baseline
images                     images download demo_shapes; the user's own: picture_*
a run                      run_folder run_plots checkpoint ownership files tensorboard_log teachers
scoring                    scoring metrics report scoring_ledger
drawing and text           plots canvas text
"""
