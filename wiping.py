"""Table Wiping, section VI: a Panda arm wipes dirt off a table, seen by two colour cameras (Fig. 6).

robosuite's Wipe as a Gymnasium environment: rendered fast enough for a CPU, with domain randomisation. It needs
`pip install -r requirements-wiping.txt`, and `envs.py` beside it.

    control step   one action of the arm's controller, at 20 Hz
    decision       one action, repeated for `action_repeat` control steps
    marker         a disc of dirt, 4 cm wide; 50 of them overlap to a line

    world = TableWiping(randomize=True)
    observation, info = world.reset(seed=0)               # {"workspace", "robot"}, a picture each
    observation, reward, terminated, truncated, info = world.step(scripted_action(info))
"""

import ctypes
import importlib.util
import logging
import sys

import numpy as np

from envs import IMAGE, SIZE, World, import_renderer

CAMERAS = {"workspace": "agentview", "robot": "robot0_eye_in_hand"}  # sensor: camera of robosuite
INSTALL = "pip install -r requirements-wiping.txt"
MARKERS = 50


# ---- 1. The world, Fig. 6 ----


class TableWiping(World):
    """robosuite's Wipe and its reward, seen from above the table's edge and from the arm's hand.

    workspace, robot  (64, 64, 3) uint8
    action            (6,) in [-1, 1]: shift and turn of the tool, 1 stands for 5 cm or 0.5 rad
    randomize         give every episode its own colours, lights and camera poses

    The task is that of robosuite's own benchmark (Dev. D17): an episode has 500 control steps, two for each decision,
    and time alone ends it. A control step in a collision or a joint limit costs 0.33, a wiped marker earns 1.64, and
    every step on a clean table 0.84. Raises ValueError if robosuite is not installed.
    """

    action_repeat, episode_steps = 2, 250

    def __init__(self, randomize=False):
        if importlib.util.find_spec("robosuite") is None:
            raise ValueError(f"table_wiping needs robosuite, which is not installed: {INSTALL}")
        super().__init__({name: IMAGE for name in CAMERAS}, action_size=6)
        self.randomize, self.environment = randomize, None

    def load(self):
        """Build the simulator and its renderer."""
        _render = import_renderer()
        import mujoco

        # robosuite warns at import of modules that Wipe does not use, and at every step of a joint limit.
        logging.getLogger("robosuite_logs").addFilter(lambda record: record.levelno >= logging.ERROR)
        import robosuite
        from robosuite.environments.manipulation.wipe import DEFAULT_WIPE_CONFIG

        self.environment = robosuite.make(
            "Wipe", robots="Panda", horizon=self.action_repeat * self.episode_steps, ignore_done=True,
            task_config=DEFAULT_WIPE_CONFIG | {"num_markers": MARKERS, "early_terminations": False},
            hard_reset=False, use_object_obs=False, use_camera_obs=False, has_renderer=False,
            has_offscreen_renderer=False, renderer="mujoco", seed=0,
        )
        self.mujoco, sim = mujoco, self.environment.sim
        self.model, self.data = sim.model._model, sim.data._data
        markers = self.environment.model.mujoco_arena.markers
        self.markers = np.array([sim.model.body_name2id(marker.root_body) for marker in markers])
        self.discs = np.array([sim.model.geom_name2id(marker.visual_geoms[0]) for marker in markers])
        self.tool = self.environment.robots[0].eef_site_id["right"]
        self.look_changer = LookChanger(mujoco, self.model, self.discs)
        # The control suite believes that no other kind of context is ever current.
        self.gl = _render.Renderer(SIZE, SIZE)
        with self.gl.make_current() as gl:
            gl.call(self.open_renderer)
        # The files of the model: 180 MB that every worker process would keep.
        mujoco.mj_clearCache(mujoco.mj_getCache())
        ctypes.CDLL(None).malloc_trim(0)

    def open_renderer(self):
        """Make a renderer of our own: robosuite's cannot be made cheaper."""
        # In software, shadows, multisampling and reflections cost four times the rest of a frame.
        mujoco, quality = self.mujoco, self.model.vis.quality
        quality.shadowsize, quality.offsamples = 0, 0
        quality.numslices, quality.numstacks = 16, 2  # the markers are 50 cylinders
        self.context = mujoco.MjrContext(self.model, mujoco.mjtFontScale.mjFONTSCALE_100)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        self.scene = mujoco.MjvScene(self.model, maxgeom=1000)
        self.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self.visible = mujoco.MjvOption()
        self.visible.geomgroup[:] = [0, 1, 0, 0, 0, 0]  # geoms to be seen, not those that collide
        self.visible.sitegroup[:] = 0

    def begin(self, rng):
        if self.environment is None:
            self.load()  # only now, in the worker: an open OpenGL does not survive a fork
        # Two generators, so that one seed gives the same task with and without randomisation.
        task_rng, look_rng = rng.spawn(2)
        self.environment.rng = self.environment.model.mujoco_arena.rng = task_rng
        self.environment.reset()
        if self.randomize:
            self.look_changer.change(look_rng)
            self.mujoco.mj_camlight(self.model, self.data)  # poses in the world, and nothing else

    def move(self, action):
        return float(sum(self.environment.step(action)[1] for _ in range(self.action_repeat))), False

    def sense(self, names):
        return {name: self.look(CAMERAS[name]) for name in names}

    def render(self):
        return self.look(CAMERAS["workspace"])

    def look(self, camera):
        """The present picture of a camera of robosuite, (64, 64, 3) uint8."""
        mujoco = self.mujoco
        view = mujoco.MjvCamera()
        view.type, view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, self.model.camera(camera).id
        everything = mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self.model, self.data, self.visible, None, view, everything, self.scene)
        rgb, rectangle = np.empty((SIZE, SIZE, 3), np.uint8), mujoco.MjrRect(0, 0, SIZE, SIZE)
        with self.gl.make_current() as gl:
            gl.call(mujoco.mjr_render, rectangle, self.scene, self.context)
            gl.call(mujoco.mjr_readPixels, rgb, None, rectangle, self.context)
        return rgb[::-1]  # OpenGL's rows go from the bottom up

    @property
    def info(self):
        """Positions (3,) of the tool and of the nearest dirt, in metres; the number of wiped markers."""
        dirty = self.model.geom_rgba[self.discs, 3] > 0  # robosuite makes a wiped marker transparent
        tool = self.data.site_xpos[self.tool].copy()
        dirt = self.data.xpos[self.markers[dirty]] if dirty.any() else tool[None]
        nearest = dirt[np.linalg.norm(dirt - tool, axis=1).argmin()]
        return {"tool": tool, "dirt": nearest.copy(), "wiped": int((~dirty).sum())}

    def close(self):
        """Free the simulator and its OpenGL context."""
        if self.environment is not None:
            with self.gl.make_current() as gl:
                gl.call(self.context.free)
            self.gl.free()
            self.environment.close()
            self.environment = None


def scripted_action(info):
    """The action (6,) that goes straight to the nearest dirt and presses: the best policy we know."""
    shift = (info["dirt"] - info["tool"]) / 0.05
    if info["wiped"] < MARKERS:
        shift[2] -= 0.25  # 12 mm into the table: enough to wipe, and a small penalty at most
    return np.concatenate([np.clip(shift, -1, 1), np.zeros(3)]).astype(np.float32)


# ---- 2. Domain randomisation ----

# Half-widths of the uniform distributions around the original values: robosuite's defaults, except for the colours,
# which would stay white in its bright light. robosuite's own wrapper fails with this MuJoCo, returns the picture from
# before the change, and draws wiped markers again.
COLOUR = 0.5  # largest share of a random colour in every surface but the dirt
LIGHT = 0.1  # metres
LIGHT_COLOUR = 0.25  # of red, green and blue
LIGHT_TURN = 0.35  # radians
CAMERA = 0.01  # metres
CAMERA_TURN = 0.087  # radians
CAMERA_ANGLE = 5.0  # degrees, of the field of view


class LookChanger:
    """Change colours, lights and camera poses of a MuJoCo model around their original values.

    keep  geoms whose colour stays: the markers, whose visibility is part of the task's state
    """

    def __init__(self, mujoco, model, keep):
        self.mujoco, self.model = mujoco, model
        self.geoms = np.setdiff1d(np.flatnonzero(model.geom_group == 1), keep)
        material = model.geom_matid[self.geoms]
        own = model.geom_rgba[self.geoms, :3]
        self.colours = np.where(material[:, None] < 0, own, model.mat_rgba[material, :3])
        self.cameras = [model.camera(name).id for name in CAMERAS.values()]
        names = "light_pos light_dir light_ambient light_diffuse light_specular cam_pos cam_quat cam_fovy".split()
        self.originals = {name: getattr(model, name).copy() for name in names}
        self.headlight = {name: getattr(model.vis.headlight, name).copy() for name in ("ambient", "diffuse")}

    def change(self, rng):
        """Draw a new look, independent of the one before."""
        model, was = self.model, self.originals
        # A texture is multiplied by its geom's colour.
        share = COLOUR * rng.random((len(self.geoms), 1))
        model.geom_rgba[self.geoms, :3] = (1 - share) * self.colours + share * rng.random(self.colours.shape)

        model.light_pos[:] = was["light_pos"] + rng.uniform(-LIGHT, LIGHT, was["light_pos"].shape)
        for i, direction in enumerate(was["light_dir"]):
            self.mujoco.mju_rotVecQuat(model.light_dir[i], direction, self.turn(rng, LIGHT_TURN))
        for name in ("light_ambient", "light_diffuse", "light_specular"):
            changed = was[name] + rng.uniform(-LIGHT_COLOUR, LIGHT_COLOUR, was[name].shape)
            getattr(model, name)[:] = np.clip(changed, 0, 1)
        for name, value in self.headlight.items():
            changed = value + rng.uniform(-LIGHT_COLOUR, LIGHT_COLOUR, 3)
            getattr(model.vis.headlight, name)[:] = np.clip(changed, 0, 1)

        for camera in self.cameras:
            model.cam_pos[camera] = was["cam_pos"][camera] + rng.uniform(-CAMERA, CAMERA, 3)
            self.mujoco.mju_mulQuat(model.cam_quat[camera], self.turn(rng, CAMERA_TURN), was["cam_quat"][camera])
            model.cam_fovy[camera] = was["cam_fovy"][camera] + rng.uniform(-CAMERA_ANGLE, CAMERA_ANGLE)

    def turn(self, rng, limit):
        """A rotation by at most `limit` radians about a random axis, as a quaternion (4,)."""
        axis, quaternion = rng.normal(size=3), np.empty(4)
        self.mujoco.mju_axisAngle2Quat(quaternion, axis / np.linalg.norm(axis), rng.uniform(-limit, limit))
        return quaternion


if __name__ == "__main__":
    if importlib.util.find_spec("robosuite") is None:
        sys.exit(f"wiping.py needs robosuite: {INSTALL}")
    world, total = TableWiping(randomize=True), 0.0
    observation, info = world.reset(seed=0)
    print({name: (image.shape, str(image.dtype)) for name, image in observation.items()})
    for _ in range(60):
        _, reward, _, _, info = world.step(scripted_action(info))
        total += reward
    print(f"scripted arm: reward {total:.1f} in 60 decisions, {info['wiped']} of {MARKERS} markers wiped")
    world.close()
