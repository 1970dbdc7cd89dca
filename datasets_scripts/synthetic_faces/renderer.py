"""From a person, an expression and a scene to an aligned crop: a small rasteriser with deferred shading, on the CPU.

Every stage is a loop over triangles or pixels that numba compiles; there is no GL, no display and no GPU. The picture
is drawn at twice its size and averaged, unless it is wanted quickly. The similarity transform of the alignment is part
of the projection, so that the crop is drawn directly and nothing is warped afterwards.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from . import accessories, skin
from .expression import furrows, targets
from .identity import Identity
from .mesh import LOWER_TEETH, SKIN, TONGUE, UPPER_LASHES, UPPER_TEETH, load_head
from .scene import CROP, TEMPLATE, Scene, background, five_points, head_rotation, photograph, similarity


try:
    import numba
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("Drawing faces needs numba: pip install 'au-llava[synthetic]'") from error

OVERSAMPLING = 2
GRID = 16  # cells of the motion field along each side of the crop
SHADOW_MAP, SHADOW_REACH = 384, 4.2
# Compiled functions take plain numbers of this module as constants.
HAIR_SHELL = accessories.HAIR_SHELL
TEXTURE, X_LOW, X_SPAN = skin.TEXTURE, skin.X_RANGE[0], skin.X_RANGE[1] - skin.X_RANGE[0]
Y_HIGH, Y_SPAN = skin.Y_RANGE[1], skin.Y_RANGE[1] - skin.Y_RANGE[0]
HAIR_ROWS, HAIR_COLUMNS, HAIR_TOP = skin.HAIR_ROWS, skin.HAIR_COLUMNS, skin.HAIR_TOP
HAIR_SPAN = skin.HAIR_TOP - skin.HAIR_BOTTOM


@dataclass
class Rendering:
    """A crop and what can be known about it exactly.

    Attributes:
        image (`np.ndarray`): (224, 224, 3) uint8, sRGB.
        landmarks (`np.ndarray`): (68, 2) float32, x and y in crop pixels (the centre of the first pixel is 0).
        points (`np.ndarray`): (5, 2) float32, the points that were laid on the template, without their random
            error.
        flow (`np.ndarray`): (16, 16, 2) float16, mean shift in crop pixels of the visible face from rest to
            expression, for each cell of 14 pixels; 0 where there is no face.
        pose (`np.ndarray`): (3,) float32, yaw, pitch and the roll that is left in the crop, in degrees.
    """

    image: np.ndarray
    landmarks: np.ndarray
    points: np.ndarray
    flow: np.ndarray
    pose: np.ndarray


@numba.njit(cache=True, fastmath=True)
def rasterise(points, triangles, depth, triangle_at, weights):
    """Draw triangles into a depth buffer.

    `points` (N, 3) holds x, y in pixels and the inverse depth, which grows towards the camera. Changed in place:
    `depth` (W, W), `triangle_at` (W, W), and `weights` (W, W, 2), the perspective-correct weights of two corners.
    """
    width = depth.shape[0]
    for t in range(triangles.shape[0]):
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        x0, y0, x1, y1, x2, y2 = points[a, 0], points[a, 1], points[b, 0], points[b, 1], points[c, 0], points[c, 1]
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        if abs(area) < 1e-9:
            continue
        left, right = max(0, int(math.floor(min(x0, x1, x2)))), min(width - 1, int(math.ceil(max(x0, x1, x2))))
        top, bottom = max(0, int(math.floor(min(y0, y1, y2)))), min(width - 1, int(math.ceil(max(y0, y1, y2))))
        for y in range(top, bottom + 1):
            py = y + 0.5
            for x in range(left, right + 1):
                px = x + 0.5
                w1 = ((px - x0) * (y2 - y0) - (x2 - x0) * (py - y0)) / area
                w2 = ((x1 - x0) * (py - y0) - (px - x0) * (y1 - y0)) / area
                w0 = 1.0 - w1 - w2
                if w0 < 0 or w1 < 0 or w2 < 0:
                    continue
                z = w0 * points[a, 2] + w1 * points[b, 2] + w2 * points[c, 2]
                if z > depth[y, x]:
                    depth[y, x] = z
                    triangle_at[y, x] = t
                    weights[y, x, 0] = w0 * points[a, 2] / z
                    weights[y, x, 1] = w1 * points[b, 2] / z


@numba.njit(cache=True, fastmath=True)
def vertex_normals(vertices, triangles):
    """(N, 3) unit normals of (N, 3) vertices, weighted by the area of the triangles around them."""
    normals = np.zeros_like(vertices)
    for t in range(triangles.shape[0]):
        a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
        ux, uy, uz = vertices[b, 0] - vertices[a, 0], vertices[b, 1] - vertices[a, 1], vertices[b, 2] - vertices[a, 2]
        vx, vy, vz = vertices[c, 0] - vertices[a, 0], vertices[c, 1] - vertices[a, 1], vertices[c, 2] - vertices[a, 2]
        nx, ny, nz = uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx
        for k in (a, b, c):
            normals[k, 0] += nx
            normals[k, 1] += ny
            normals[k, 2] += nz
    for i in range(normals.shape[0]):
        length = math.sqrt(normals[i, 0] ** 2 + normals[i, 1] ** 2 + normals[i, 2] ** 2) + 1e-12
        normals[i] /= length
    return normals


@numba.njit(cache=True, fastmath=True)
def clamp(x, low, high):
    return min(max(x, low), high)


@numba.njit(cache=True, fastmath=True)
def texel(texture, x, y, channel):
    """Bilinear look-up, clamped at the borders."""
    height, width = texture.shape[0], texture.shape[1]
    x, y = clamp(x, 0.0, width - 1.001), clamp(y, 0.0, height - 1.001)
    i, j = int(x), int(y)
    fx, fy = x - i, y - j
    top = texture[j, i, channel] * (1 - fx) + texture[j, i + 1, channel] * fx
    bottom = texture[j + 1, i, channel] * (1 - fx) + texture[j + 1, i + 1, channel] * fx
    return top * (1 - fy) + bottom * fy


@numba.njit(cache=True, fastmath=True)
def eye_colour(x, y, z, palette, surface):
    """Colour of the eyeball at (x, y, z) from its centre."""
    length = math.sqrt(x * x + y * y + z * z) + 1e-9
    angle, radius = math.acos(clamp(z / length, -1.0, 1.0)), surface[1]
    red = clamp((angle - 0.6) * 1.2, 0.0, 0.5)
    r, g, b = 0.72, 0.68 * (1 - 0.35 * red), 0.66 * (1 - 0.4 * red)
    if angle < radius:
        share, around = angle / radius, math.atan2(y, x)
        spokes = 0.8 + 0.15 * math.sin(around * 23 + 3 * math.sin(around * 7)) + 0.2 * math.sin(around * 51)
        rim = 1 - clamp((share - 0.82) / 0.18, 0.0, 1.0) * 0.7
        r, g, b = palette[3, 0] * spokes * rim, palette[3, 1] * spokes * rim, palette[3, 2] * spokes * rim
        if share < surface[2]:
            r, g, b = 0.004, 0.004, 0.004
    elif angle < radius * 1.15:
        rim = 1 - 0.6 * (1 - (angle / radius - 1) / 0.15)
        r, g, b = r * rim, g * rim, b * rim
    return r, g, b


@numba.njit(cache=True, fastmath=True)
def shade(triangle_at, weights, triangles, materials, normals, positions, rest, masks, albedo, slopes, creases, hair,
          palette, surface, eye_centres, rotation, lights, light_colours, ground, sky, occlusion, shadow_points,
          shadow, image):  # fmt: skip
    """Colour every pixel that a triangle covers.

    `rest` (N, 3) are the coordinates in which everything is painted, `masks` (N, 3) lips, inside of the mouth and
    ears; `shadow` is the depth map seen from the main light and `shadow_points` (N, 3) the vertices in it; `image`
    (W, W, 3) holds the background and is changed in place. `albedo`, `slopes`, `creases` are textures of [`skin`].
    """
    width = triangle_at.shape[0]
    for y in range(width):
        for x in range(width):
            t = triangle_at[y, x]
            if t < 0:
                continue
            a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
            w0, w1 = weights[y, x, 0], weights[y, x, 1]
            w2 = 1 - w0 - w1
            nx = w0 * normals[a, 0] + w1 * normals[b, 0] + w2 * normals[c, 0]
            ny = w0 * normals[a, 1] + w1 * normals[b, 1] + w2 * normals[c, 1]
            nz = w0 * normals[a, 2] + w1 * normals[b, 2] + w2 * normals[c, 2]
            px = w0 * positions[a, 0] + w1 * positions[b, 0] + w2 * positions[c, 0]
            py = w0 * positions[a, 1] + w1 * positions[b, 1] + w2 * positions[c, 1]
            pz = w0 * positions[a, 2] + w1 * positions[b, 2] + w2 * positions[c, 2]
            rx = w0 * rest[a, 0] + w1 * rest[b, 0] + w2 * rest[c, 0]
            ry = w0 * rest[a, 1] + w1 * rest[b, 1] + w2 * rest[c, 1]
            rz = w0 * rest[a, 2] + w1 * rest[b, 2] + w2 * rest[c, 2]
            material, occluded = materials[t], occlusion[y, x]
            # What the surface is: colour, gloss and its sharpness, how far light wraps around it, how dim its inside
            # is.
            gloss, sharp, wrap_r, wrap_g, wrap_b, dim = 0.0, 20.0, 0.0, 0.0, 0.0, 1.0
            hair_x = (math.atan2(rx, rz - 0.25) + math.pi) / (2 * math.pi) * (HAIR_COLUMNS - 1)
            hair_y = (HAIR_TOP - ry) / HAIR_SPAN * (HAIR_ROWS - 1)
            if material == 0:
                tx, ty = (rx - X_LOW) / X_SPAN * TEXTURE - 0.5, (Y_HIGH - ry) / Y_SPAN * TEXTURE - 0.5
                crease = texel(creases, tx, ty, 0)
                red, green = texel(albedo, tx, ty, 0) * crease, texel(albedo, tx, ty, 1) * crease
                blue = texel(albedo, tx, ty, 2) * crease
                front = clamp((rz - 0.45) * 3, 0.0, 1.0)
                bump_x = -texel(slopes, tx, ty, 0) * front
                bump_y = -texel(slopes, tx, ty, 1) * front
                nx += rotation[0, 0] * bump_x + rotation[0, 1] * bump_y
                ny += rotation[1, 0] * bump_x + rotation[1, 1] * bump_y
                nz += rotation[2, 0] * bump_x + rotation[2, 1] * bump_y
                gloss, sharp, wrap_r, wrap_g, wrap_b = surface[0], 14.0, 0.42, 0.24, 0.17
                lip = (w0 * masks[a, 0] + w1 * masks[b, 0] + w2 * masks[c, 0]) * surface[3]
                if lip > 0.01:
                    red = red * (1 - lip) + lip * palette[0, 0]
                    green = green * (1 - lip) + lip * palette[0, 1]
                    blue = blue * (1 - lip) + lip * palette[0, 2]
                    gloss *= 1 + 1.2 * lip
                ear = w0 * masks[a, 2] + w1 * masks[b, 2] + w2 * masks[c, 2]
                cover = texel(hair, hair_x, hair_y, 0) * (1 - clamp(2 * ear, 0.0, 1.0) * (1 - surface[5]))
                if cover > 0:
                    strand = texel(hair, hair_x, hair_y, 1)
                    red = red * (1 - cover) + cover * palette[1, 0] * strand
                    green = green * (1 - cover) + cover * palette[1, 1] * strand
                    blue = blue * (1 - cover) + cover * palette[1, 2] * strand
                    gloss = gloss * (1 - cover) + 0.12 * cover
                    wrap_r, wrap_g, wrap_b = wrap_r * (1 - cover), wrap_g * (1 - cover), wrap_b * (1 - cover)
                if ry < surface[4] + 0.25 * abs(rx) - 0.1 * rz:
                    red, green, blue, gloss = palette[2, 0], palette[2, 1], palette[2, 2], 0.02
                inside = w0 * masks[a, 1] + w1 * masks[b, 1] + w2 * masks[c, 1]
                if inside > 0.5:
                    dark = clamp((rz - 1.05) / 0.30, 0.02, 0.6)
                    red, green, blue, gloss = 0.30 * dark, 0.07 * dark, 0.06 * dark, 0.0
                    occluded *= dark * 1.5
                    dim = dark * 1.2
            elif material == 1 or material == 2:
                ex, ey = rx - eye_centres[material - 1, 0], ry - eye_centres[material - 1, 1]
                ez = rz - eye_centres[material - 1, 2]
                red, green, blue = eye_colour(ex, ey, ez, palette, surface)
                gloss, sharp = 0.9, 220.0
                occluded *= occluded
            elif material in (UPPER_TEETH, LOWER_TEETH):
                gap = 0.55 + 0.45 * min(abs(math.sin(rx * math.pi / 0.085)) * 3, 1.0)
                dark = clamp((rz - 1.0) / 0.4, 0.05, 1.0)
                red, green, blue, gloss, sharp = 0.78 * gap * dark, 0.74 * gap * dark, 0.66 * gap * dark, 0.25, 60.0
                if (material == UPPER_TEETH and ry > 6.755) or (material == LOWER_TEETH and ry < 6.515):
                    red, green, blue = 0.42 * dark, 0.13 * dark, 0.12 * dark
                occluded *= 0.8
            elif material == TONGUE:
                dark = clamp((rz - 0.95) / 0.45, 0.05, 1.0)
                red, green, blue, gloss, sharp = 0.42 * dark, 0.12 * dark, 0.11 * dark, 0.06 * dark, 30.0
                occluded *= 0.6 * dark
                dim = 0.45
            elif material == HAIR_SHELL:
                strand = texel(hair, hair_x, hair_y, 1)
                red, green, blue, gloss = palette[1, 0] * strand, palette[1, 1] * strand, palette[1, 2] * strand, 0.12
            else:
                red, green, blue, gloss, sharp = palette[4, 0], palette[4, 1], palette[4, 2], 0.8, 60.0

            length = math.sqrt(nx * nx + ny * ny + nz * nz) + 1e-9
            nx, ny, nz = nx / length, ny / length, nz / length
            length = math.sqrt(px * px + py * py + pz * pz)
            vx, vy, vz = -px / length, -py / length, -pz / length
            facing = nx * vx + ny * vy + nz * vz
            if facing < 0 and material != 1 and material != 2:
                nx, ny, nz, facing = -nx, -ny, -nz, -facing
            facing = max(facing, 0.0)
            up = 0.5 + 0.5 * ny
            light_r = (ground[0] * (1 - up) + sky[0] * up) * occluded
            light_g = (ground[1] * (1 - up) + sky[1] * up) * occluded
            light_b = (ground[2] * (1 - up) + sky[2] * up) * occluded
            mirror = (0.04 + 0.96 * (1 - facing) ** 5) * gloss * 0.5 * occluded
            shine_r, shine_g, shine_b = mirror * sky[0], mirror * sky[1], mirror * sky[2]
            for k in range(lights.shape[0]):
                lx, ly, lz = lights[k, 0], lights[k, 1], lights[k, 2]
                cosine, lit = nx * lx + ny * ly + nz * lz, 1.0
                if k == 0:  # only the main light throws shadows
                    qx = int(w0 * shadow_points[a, 0] + w1 * shadow_points[b, 0] + w2 * shadow_points[c, 0])
                    qy = int(w0 * shadow_points[a, 1] + w1 * shadow_points[b, 1] + w2 * shadow_points[c, 1])
                    qz = w0 * shadow_points[a, 2] + w1 * shadow_points[b, 2] + w2 * shadow_points[c, 2]
                    free = 0.0
                    for j in range(qy - 2, qy + 3):
                        for i in range(qx - 2, qx + 3):
                            outside = i < 0 or j < 0 or i >= shadow.shape[1] or j >= shadow.shape[0]
                            if outside or shadow[j, i] - qz < 0.035:
                                free += 1.0
                    lit = free / 25
                shaded = (1 - lit) * 0.2
                light_r += light_colours[k, 0] * max((cosine + wrap_r) / (1 + wrap_r), 0.0) * (lit + shaded * wrap_r)
                light_g += light_colours[k, 1] * max((cosine + wrap_g) / (1 + wrap_g), 0.0) * (lit + shaded * wrap_g)
                light_b += light_colours[k, 2] * max((cosine + wrap_b) / (1 + wrap_b), 0.0) * (lit + shaded * wrap_b)
                if cosine > 0:
                    hx, hy, hz = lx + vx, ly + vy, lz + vz
                    half = max((nx * hx + ny * hy + nz * hz) / (math.sqrt(hx * hx + hy * hy + hz * hz) + 1e-9), 0.0)
                    glint = gloss * half**sharp * (sharp + 8) / 25.0 * 0.35 * cosine * lit * occluded
                    shine_r += glint * light_colours[k, 0]
                    shine_g += glint * light_colours[k, 1]
                    shine_b += glint * light_colours[k, 2]
            image[y, x, 0] = red * light_r * dim + shine_r
            image[y, x, 1] = green * light_g * dim + shine_g
            image[y, x, 2] = blue * light_b * dim + shine_b


@numba.njit(cache=True, fastmath=True)
def motion_field(triangle_at, weights, triangles, materials, screen, screen_at_rest, covered, cells):
    """Mean shift (cells, cells, 2), in pixels of `triangle_at`, of the visible face from rest to expression."""
    width = triangle_at.shape[0]
    total, count = np.zeros((cells, cells, 2)), np.zeros((cells, cells))
    for y in range(width):
        for x in range(width):
            t = triangle_at[y, x]
            if t < 0 or materials[t] > TONGUE or covered[y, x]:
                continue
            a, b, c = triangles[t, 0], triangles[t, 1], triangles[t, 2]
            w0, w1 = weights[y, x, 0], weights[y, x, 1]
            w2 = 1 - w0 - w1
            j, i = y * cells // width, x * cells // width
            for k in range(2):
                total[j, i, k] += (
                    w0 * (screen[a, k] - screen_at_rest[a, k])
                    + w1 * (screen[b, k] - screen_at_rest[b, k])
                    + w2 * (screen[c, k] - screen_at_rest[c, k])
                )
            count[j, i] += 1
    for j in range(cells):
        for i in range(cells):
            total[j, i] /= max(count[j, i], 1.0)
    return total


def pose_mesh(identity: Identity, activations: dict[str, float], gaze: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """(S, 3) smoothed head of a person with an expression; `gaze` is to the subject's left and up, -1 to 1."""
    head = load_head()
    vertices = identity.vertices.copy()
    weights = targets(activations, identity.style)
    for side, outward in (("Left", 1), ("Right", -1)):
        weights[f"fu/eyeLook{'Out' if gaze[0] * outward > 0 else 'In'}{side}"] = abs(gaze[0])
        weights[f"fu/eyeLook{'Up' if gaze[1] > 0 else 'Down'}{side}"] = abs(gaze[1])
    for target, weight in weights.items():
        if target.startswith("expr/~/"):
            for race, share in identity.race.items():
                head.add(vertices, target.replace("~", race), share * weight)
        else:
            head.add(vertices, target, weight)
    if identity.sculpt is not None:
        vertices = identity.vertices + identity.sculpt * (vertices - identity.vertices)
    return head.smooth(vertices)


def render(
    identity: Identity,
    activations: dict[str, float],
    scene: Scene,
    rng: np.random.Generator,
    gaze: tuple[float, float] = (0.0, 0.0),
    oversampling: int = OVERSAMPLING,
) -> Rendering:
    """Draw one aligned crop.

    Args:
        identity (`Identity`): Who.
        activations (`dict`): Expression, action to activation 0 to 1 (see [`expression.ACTIONS`]).
        scene (`Scene`): Camera, light and faults of the photograph.
        rng (`np.random.Generator`): Where background, noise and the shape of an occluder come from.
        gaze (`tuple[float, float]`): Direction of the eyes, to the subject's left and up, -1 to 1.
        oversampling (`int`): How many times larger than it is the crop is drawn; with 1 edges are jagged.

    Returns:
        `Rendering`: the crop with landmarks, motion field and pose.
    """
    head, width = load_head(), CROP * oversampling
    face, at_rest = pose_mesh(identity, activations, gaze), pose_mesh(identity, {}, gaze)
    vertices, rest, masks, triangles, materials = _assemble(head, identity, face)

    rotation = head_rotation(scene.yaw, scene.pitch, scene.roll).astype(np.float32)
    landmarks = identity.neutral[head.landmarks]
    middle = landmarks[[36, 39, 42, 45]].mean(0) + [0, -0.30, -0.35]

    def to_camera(points):
        placed = ((points - middle) @ rotation.T).astype(np.float32)
        placed[:, 2] -= scene.distance
        return placed

    def to_plane(placed):
        return np.stack([placed[:, 0], -placed[:, 1]], 1) / -placed[:, 2:]

    in_camera = to_camera(vertices)
    plane = to_plane(in_camera)
    points = to_plane(to_camera(five_points(face[head.landmarks])))
    align = similarity(points, TEMPLATE + scene.jitter)

    def to_crop(points):
        return points @ align[:, :2].T + align[:, 2]

    crop_points = to_crop(plane)
    # A pixel's centre is a whole number in crop coordinates and half of one more in the rasteriser.
    screen = np.empty_like(in_camera)
    screen[:, :2] = oversampling * (crop_points + 0.5)
    screen[:, 2] = -1 / in_camera[:, 2]
    screen_at_rest = screen.copy()
    lifted = at_rest + (vertices[: len(face)] - face)
    screen_at_rest[: len(face), :2] = oversampling * (to_crop(to_plane(to_camera(lifted))) + 0.5)

    depth, triangle_at = np.zeros((width, width), np.float32), np.full((width, width), -1, np.int32)
    weights = np.zeros((width, width, 2), np.float32)
    rasterise(screen, triangles, depth, triangle_at, weights)
    visible = triangle_at >= 0

    lights = scene.lights / np.linalg.norm(scene.lights, axis=1, keepdims=True)
    shadow_points, shadow = _shadow_map(in_camera, triangles, lights[0])
    slopes, creases = _relief(identity, activations, scene)
    image = background(rng, width, scene.plain_background)
    shade(
        triangle_at, weights, triangles, materials, vertex_normals(in_camera, triangles), in_camera, rest, masks,
        identity.albedo, slopes, creases[..., None], identity.hair, identity.palette, identity.surface,
        head.eye_centres, rotation, lights.astype(np.float32), scene.light_colours.astype(np.float32),
        scene.ground.astype(np.float32), scene.sky.astype(np.float32),
        _occlusion(depth, visible, scene.distance, oversampling), shadow_points, shadow, image,
    )  # fmt: skip
    face_pixels = visible & (materials[np.maximum(triangle_at, 0)] == SKIN)
    face_light = image[face_pixels].mean(0) if face_pixels.any() else np.full(3, 0.2)
    _draw_lashes(head, screen, depth, identity, image)
    if identity.lenses:
        _draw_lenses(rng, identity, to_camera, to_plane, to_crop, depth, scene, image, oversampling)
    covered = np.zeros((width, width), bool)
    if scene.occluded:
        covered = accessories.draw_occluder(rng, image, face_light, skin.noise(rng, "grain"))

    flow = (
        motion_field(triangle_at, weights, triangles, materials, screen, screen_at_rest, covered, GRID) / oversampling
    )
    small = image.reshape(CROP, oversampling, CROP, oversampling, 3).mean((1, 3))
    # Dark skin stays darker than light skin, but not by as much as its reflectance: exposure follows the face half-
    # way.
    brightness = float(face_light.mean()) / math.sqrt(float(identity.palette[5].mean()) / 0.2)
    turn = math.degrees(math.atan2(-align[1, 0], align[0, 0]))
    return Rendering(
        image=photograph(rng, small, max(brightness, 1e-3), scene),
        landmarks=crop_points[head.landmarks].astype(np.float32),
        flow=flow.astype(np.float16),
        points=to_crop(points).astype(np.float32),
        pose=np.array([scene.yaw, scene.pitch, scene.roll + turn], np.float32),
    )


def _assemble(head, identity, face):
    """Join head, hair and frame: vertices, their painting coordinates and masks, triangles and materials."""
    parts = [(face + _hair_offset(head, identity), head.triangles)]
    materials = [head.materials]
    for mesh, material in ((identity.shell, accessories.HAIR_SHELL), (identity.frame, accessories.FRAME)):
        if mesh:
            parts.append(mesh)
            materials.append(np.full(len(mesh[1]), material, np.int32))
    vertices, triangles = accessories.join(parts)
    rest = np.concatenate([head.rest, vertices[len(face) :]]).astype(np.float32)
    masks = np.zeros((len(vertices), 3), np.float32)
    masks[: len(face)] = np.stack([head.lips, head.inside, head.ears], 1)
    return vertices, rest, masks, triangles, np.concatenate(materials)


def _hair_offset(head, identity):
    """(S, 3) how far hair lifts the surface off the skull."""
    column = (np.arctan2(head.rest[:, 0], head.rest[:, 2] - 0.25) + np.pi) / (2 * np.pi) * (skin.HAIR_COLUMNS - 1)
    row = (skin.HAIR_TOP - head.rest[:, 1]) / (skin.HAIR_TOP - skin.HAIR_BOTTOM) * (skin.HAIR_ROWS - 1)
    cover = ndimage.gaussian_filter(identity.hair[..., 0], 4)
    lift = ndimage.map_coordinates(cover, [row, column], order=1, mode="nearest") * identity.hair_thickness
    lift *= 1 - np.clip(2 * head.ears, 0, 1)
    on_skin = np.zeros(len(lift), np.float32)
    on_skin[head.skin] = 1
    on_skin[head.rest[:, 1] < 6.4] = 0
    return vertex_normals(identity.neutral, head.triangles) * (lift * on_skin * (1 - head.inside))[:, None]


def _shadow_map(in_camera, triangles, light):
    """Depth of everything seen from the main light, and the vertices in that map."""
    right = np.cross([0, 1, 0], light)
    right /= np.linalg.norm(right)
    up = np.cross(light, right)
    around = in_camera - in_camera.mean(0)
    scale = SHADOW_MAP / SHADOW_REACH
    points = np.stack(
        [around @ right * scale + SHADOW_MAP / 2, SHADOW_MAP / 2 - around @ up * scale, around @ light + 20], 1
    )
    points, shape = points.astype(np.float32), (SHADOW_MAP, SHADOW_MAP)
    shadow = np.zeros(shape, np.float32)
    rasterise(points, triangles, shadow, np.empty(shape, np.int32), np.empty((*shape, 2), np.float32))
    return points, shadow


def _relief(identity, activations, scene):
    """Slopes and creases of the skin with this expression's furrows."""
    strengths = identity.age_lines.copy()
    raised = furrows(activations)
    for k, name in enumerate(skin.wrinkle_bank()):
        strengths[k] += scene.wrinkles * identity.wrinkling[k] * raised.get(name, 0.0)
    return skin.relief(identity.relief, strengths)


def _occlusion(depth, visible, distance, oversampling):
    """(W, W) 0.25 to 1: what lies deeper than its surroundings gets less light from the sky."""
    far = np.where(visible, 1 / np.maximum(depth, 1e-6), distance + 1.2).astype(np.float32)
    result = np.ones_like(far)
    for size, strength in ((3 * oversampling + 1, 3.5), (9 * oversampling + 1, 1.3)):
        around = ndimage.uniform_filter(ndimage.uniform_filter(far, size), size)
        result *= np.clip(1 - strength * np.maximum(far - around - 0.004, 0), 0.25, 1)
    return result


def _draw_lashes(head, screen, depth, identity, image):
    """Blend the eyelashes over the picture; single hairs are cut out of their strip by its texture coordinates."""
    triangle_at, weights = np.full(depth.shape, -1, np.int32), np.zeros((*depth.shape, 2), np.float32)
    rasterise(screen, head.lash_triangles, depth - np.float32(2e-5), triangle_at, weights)
    drawn = triangle_at >= 0
    t = triangle_at[drawn]
    corner = np.concatenate([weights[drawn], 1 - weights[drawn].sum(1, keepdims=True)], 1)[..., None]
    uv = (head.lash_uv[t] * corner).sum(1)
    upper = head.lash_materials[t] == UPPER_LASHES
    along = np.where(upper, (uv[:, 1] - 0.927) / 0.02, (0.985 - uv[:, 1]) / 0.018)  # 0 at the lid, 1 at the tip
    cover = np.clip((np.sin(uv[:, 0] * 2400 + along * 3) * 0.5 + 0.5) * 1.3, 0, 1)
    cover *= np.where(upper, 0.9 * np.clip(1.15 - along, 0, 1), 0.24 * np.clip(1 - along, 0, 1))
    image[drawn] = image[drawn] * (1 - cover[:, None]) + cover[:, None] * identity.palette[1] * 0.15


def _draw_lenses(rng, identity, to_camera, to_plane, to_crop, depth, scene, image, oversampling):
    """Blend the lenses of the glasses: a slight tint and a soft reflection of the sky."""
    vertices, triangles = identity.lenses
    placed = to_camera(vertices)
    points = np.concatenate([oversampling * (to_crop(to_plane(placed)) + 0.5), -1 / placed[:, 2:]], 1).astype(
        np.float32
    )
    triangle_at = np.full(depth.shape, -1, np.int32)
    rasterise(points, triangles, depth.copy(), triangle_at, np.zeros((*depth.shape, 2), np.float32))
    drawn = triangle_at >= 0
    y, x = np.nonzero(drawn)
    slope, place, size = rng.normal(0, 1), rng.uniform(0.3, 0.7), rng.uniform(0.03, 0.15)
    width = depth.shape[0]
    streak = np.exp(-((((x + slope * y) / width - place * (1 + slope)) / size) ** 2)) * rng.uniform(0, 0.2)
    tint, sheen = rng.uniform(0.85, 1.0), rng.uniform(0.0, 0.03)
    image[drawn] = image[drawn] * tint * (1 - streak[:, None]) + (sheen + streak)[:, None] * scene.sky
